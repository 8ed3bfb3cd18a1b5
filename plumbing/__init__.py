"""What makes the method work on real inputs; nobody needs to read it to understand the paper."""
