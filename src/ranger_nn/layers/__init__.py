"""What the layers of all frameworks share: shapes, routing and recurrences written against an array namespace."""
