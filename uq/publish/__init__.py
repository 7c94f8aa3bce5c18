"""A bundle on its way to the Hub: checked in full, described by a card, sent in one commit."""
