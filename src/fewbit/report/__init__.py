"""What a person looks at: the results file, the terminal table, the figures and the page; all of them from a results file alone."""
