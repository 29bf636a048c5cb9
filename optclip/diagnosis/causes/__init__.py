"""The causes that a diagnosis can name, one file per cause."""
