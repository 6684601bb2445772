"""The file system, as it really is: mounts that hang, disks with bad places, names made durable."""
