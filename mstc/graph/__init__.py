"""Analysis and editing of graphs: normal form, axes, regions, editor, checker, text."""
