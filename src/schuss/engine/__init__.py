"""The engine: the only loops over parameters. Rules know nothing of it; it knows rules as functions of symbols."""
