"""Parts of the papers as they were published, simplifications and all: to check our reading, and to compare with.

What plans are made with is elsewhere: exact models, measured rates, shared lines.
"""
