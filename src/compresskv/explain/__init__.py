"""What was kept of a prompt, and a page that shows it."""
