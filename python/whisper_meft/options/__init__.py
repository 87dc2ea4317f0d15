"""Command-line options: the parser and the groups of options that several commands share."""
