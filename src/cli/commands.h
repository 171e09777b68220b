// SPDX-License-Identifier: MIT
// cli/commands.h: one table a command, each in its own cmd_NAME.c.
#ifndef KEEL_CLI_COMMANDS_H
#define KEEL_CLI_COMMANDS_H

#include "args.h"

extern const struct arg_command cmd_devices, cmd_info, cmd_tokenize, cmd_run, cmd_score, cmd_perplexity, cmd_train, cmd_export;
extern const struct arg_command cmd_study, cmd_report, cmd_bench, cmd_doctor, cmd_convert, cmd_quantize, cmd_merge;
extern const struct arg_command cmd_capture, cmd_direction, cmd_project, cmd_geometry;

#endif
