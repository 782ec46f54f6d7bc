"""What a person types and what the terminal answers: words to calls, what a command is about, results as text."""
