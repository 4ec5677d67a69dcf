"""Tables from records: `frame` has the numbers, `columns` what is shown of them, `building` puts a table together."""
