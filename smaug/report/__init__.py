"""What runs reached and what it cost, side by side: a page for a browser, a table, JSON."""
