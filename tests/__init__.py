"""What holds: each test's name is the sentence it proves."""
