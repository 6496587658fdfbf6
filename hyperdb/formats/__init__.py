"""Files that personalisations are kept in."""
