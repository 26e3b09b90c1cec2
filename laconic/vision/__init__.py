"""Visual token reduction: methods that shorten what a picture brings into the language model."""
