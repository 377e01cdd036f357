"""Model files of other libraries, one library per file."""
