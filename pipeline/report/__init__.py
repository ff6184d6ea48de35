"""What people look at: a run's records read, and the page that shows them."""
