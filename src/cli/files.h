// SPDX-License-Identifier: MIT
// cli/files.h: the files that a command's options name, checked before it runs.
#ifndef KEEL_CLI_FILES_H
#define KEEL_CLI_FILES_H

#include "args.h"

// An output may be no input and no other output, by device and inode, and one of kind ARG_OUT must be possible to make. Returns the exit
// code: 0, or after a line to stderr that of wrong usage or of a failure.
int check_files(const struct arg_command *command, const void *args);

#endif
