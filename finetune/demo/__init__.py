"""`graft demo`: every stage in one run, and a report for a sceptic."""
