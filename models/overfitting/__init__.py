"""Small training sets with wrong labels, and what is drawn of networks that overfit them (day 3)."""
