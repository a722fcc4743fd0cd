"""Files in and out: images and arrays, read within a stated size and written all or nothing.

Enter at `inputs.load_input` (what a model is fed) or `image.read_image` and `image.write_image`.
Pillow and tifffile are imported only when a file needs them. No framework is imported.
"""
