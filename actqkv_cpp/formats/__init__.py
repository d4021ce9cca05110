"""Text out of the formats that people keep documents in, with the places that sources are reported by.

Each module has `read`, which takes a file's bytes and gives an `Extract`; it raises DocumentError with the remedy.

pdf         pypdfium2 (Apache-2.0 or BSD-3, wheels): PDFium, the reader of Chrome; fast, and fuzzed as a browser must be
docx        mammoth (BSD-2, pure Python): also keeps footnotes, content controls and accepted changes
html, epub  lxml (BSD-3, wheels): takes any page in linear time; html.parser of Python fails or stalls on hostile ones
markdown    a scan for headings; the text stays as it is
"""
