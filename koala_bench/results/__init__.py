"""Records in; tables, figures and the report out. Needs no model.

``making`` writes the tables and figures of a folder of records, ``recipes`` plans what ``reproduce`` runs,
``integrity`` verifies a folder against its record, ``answers`` reads answer files of other projects. Read ``making``
first.
"""
