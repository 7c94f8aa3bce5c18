/* A layer between one process and its disk, for LD_PRELOAD: counts the calls that change files below
   one folder, and at a chosen one kills the process, fills the disk or breaks it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static char written[4096], source[4096]; /* folders: what is written, what is read */
static long kill_at = -1, room = -1, sync_at = -1, read_at = -1;
static long changes, syncs, reads;

/* Numbers count from 0; -1: never. `bytes` is the room that is left on the disk. */
void soak_begin(const char *out, const char *in, long kill, long bytes, long sync, long read) {
  snprintf(written, sizeof written, "%s/", out);
  snprintf(source, sizeof source, "%s/", in);
  kill_at = kill, room = bytes, sync_at = sync, read_at = read;
  changes = syncs = reads = 0;
}

long soak_changes(void) { return changes; }
long soak_syncs(void) { return syncs; }
long soak_reads(void) { return reads; }

static int below(const char *path, const char *folder) {
  return folder[0] && strncmp(path, folder, strlen(folder)) == 0;
}

static int open_below(int fd, const char *folder) {
  char link[64], path[4096];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path, folder);
}

static int change(void) { return __atomic_fetch_add(&changes, 1, __ATOMIC_SEQ_CST) == kill_at; }
static void die(void) { kill(getpid(), SIGKILL); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
  if (open_below(fd, written)) {
    if (change()) {
      REAL(write)(fd, data, size / 2); /* torn */
      die();
    }
    if (room == 0) return errno = ENOSPC, -1;
    if (room > 0) {
      if (size > (size_t)room) size = room;
      room -= size;
    }
  }
  return REAL(write)(fd, data, size);
}

int fsync(int fd) {
  if (open_below(fd, written)) {
    if (change()) die();
    long now = __atomic_fetch_add(&syncs, 1, __ATOMIC_SEQ_CST);
    if (sync_at >= 0 && now >= sync_at) return errno = EIO, -1;
  }
  return REAL(fsync)(fd);
}

int rename(const char *from, const char *to) {
  if (below(to, written) && change()) die();
  return REAL(rename)(from, to);
}

int unlink(const char *path) {
  if (below(path, written) && change()) die();
  return REAL(unlink)(path);
}

static int broken_read(int fd) {
  if (!open_below(fd, source)) return 0;
  long now = __atomic_fetch_add(&reads, 1, __ATOMIC_SEQ_CST);
  return read_at >= 0 && now >= read_at;
}

ssize_t read(int fd, void *data, size_t size) {
  if (broken_read(fd)) return errno = EIO, -1;
  return REAL(read)(fd, data, size);
}

/* The one that Python's os.preadv takes. */
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
  if (broken_read(fd)) return errno = EIO, -1;
  return REAL(preadv64v2)(fd, parts, count, offset, flags);
}

ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  if (broken_read(fd)) return errno = EIO, -1;
  return REAL(preadv2)(fd, parts, count, offset, flags);
}
