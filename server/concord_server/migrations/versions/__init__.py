"""Each step in its own file, in order; a step that was released is never changed."""
