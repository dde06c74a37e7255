"""A generator of English text about a little world: stories, questions and answers, all decided by a seed."""
