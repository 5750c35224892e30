"""Programs that show kvrep at work; run them from a checkout."""
