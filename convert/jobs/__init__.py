"""Long work on whole folders: killed and continued, checked, held against the original."""
