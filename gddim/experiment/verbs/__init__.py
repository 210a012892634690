"""What a command line can be told to do, a verb a file."""
