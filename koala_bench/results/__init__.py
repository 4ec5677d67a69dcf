"""What is published of records. Needs no model.

In: records of runs. Out: tables, figures, the report, and whether a folder still agrees with its record.

``making`` writes the tables and figures of a folder of records, ``recipes`` plans what ``reproduce`` runs,
``integrity`` verifies a folder against its record, ``answers`` reads answer files of other projects. Read ``making``
first.
"""
