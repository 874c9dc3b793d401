"""What a file says: sections, symbols, relocations, fentry sites and struct layouts.  Runs nothing."""
