"""The passes: one graph transform per file. Import it as `mstc.passes`."""

if __name__ == "passes":
    raise ImportError("import mstc.passes; the folder passes/ is no package of its own")
