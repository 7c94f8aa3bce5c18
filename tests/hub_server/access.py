"""Who may see a repository, read its files, write into it."""

from __future__ import annotations

from tests.hub_server.exchange import Refusal, Request
from tests.hub_server.store import Commit, Repository

FORBIDDEN = "You don't have the rights to do this with this token"


def found(request: Request, repo: str, revision: str) -> tuple[Repository, Commit]:
    """Raises Refusal: private or missing, which the Hub does not tell apart, or no such revision"""
    repository, account = request.store.repositories.get(repo), request.account
    if request.token and account is None:
        raise Refusal(401, "", "Invalid credentials in Authorization header")
    owner = repo.partition("/")[0]
    ours = account is not None and owner in (account.name, *account.organizations)
    if repository is None or (repository.private and not ours):
        raise Refusal(404 if account else 401, "RepoNotFound", "Repository not found")
    commit = repository.find(revision)
    if commit is None:
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return repository, commit


def require_accepted(request: Request, repository: Repository) -> None:
    account = request.account
    if not repository.gated or (account and repository.id in account.accepted):
        return
    words = f"Access to model {repository.id} is restricted"
    raise Refusal(403 if account else 401, "GatedRepo", words)


def require_writer(request: Request, repo: str) -> None:
    account = request.account
    if account is None:
        raise Refusal(401, "", "Invalid username or password.")
    if not account.may_write(repo):
        raise Refusal(403, "", FORBIDDEN)
