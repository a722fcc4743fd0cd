"""Region rules, one file per family of operators. Each function takes shapes and integers and gives a `Rule`.

No framework is imported here: an adapter reads its framework's arguments and calls these.
"""
