"""The command line: `whisper-meft`, one file for each subcommand."""
