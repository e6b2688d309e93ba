"""A vocabulary that several ranks share, and rows that they share out."""
