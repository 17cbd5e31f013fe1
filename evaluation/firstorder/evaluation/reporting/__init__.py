"""The one way to show what runs found: intervals, tables, figures, pages."""
