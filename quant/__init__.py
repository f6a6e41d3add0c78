"""Number formats for any nn.Linear."""
