"""What names of files and folders say: whose a scan is, and what is a label map of which image."""
