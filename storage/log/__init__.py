"""A domain's log: its records, what each does to the state, and a view made from them."""
