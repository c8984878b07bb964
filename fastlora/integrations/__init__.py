"""Doors to other libraries; each file here may import the library it is named after."""
