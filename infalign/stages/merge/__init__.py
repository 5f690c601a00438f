"""`infalign merge`: several models of one architecture become one."""
