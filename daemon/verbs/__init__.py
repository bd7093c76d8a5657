"""The verbs of the command line, one idea a file. Only click is imported before it is needed."""
