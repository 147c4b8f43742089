"""What each command does and prints; the command line imports a command's file only when it is given."""
