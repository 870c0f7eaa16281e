"""The transforms: each a page on top of `mutatis.lifting` or `mutatis.compiling`."""
