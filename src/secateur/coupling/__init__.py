"""Which channels live and die together: tape (one recorded forward), labels, rules per op, groups."""
