// SPDX-License-Identifier: MIT
// cli/geometry.h: what the files of `keel geometry` share.
#ifndef KEEL_CLI_GEOMETRY_H
#define KEEL_CLI_GEOMETRY_H

#include <jansson.h>

// Prints the result {"adapters", "overlaps", "shifts", "angles", "probes"} (docs/steering.md, "Geometry") as tables to stdout.
void geometry_print(const json_t *result);

#endif
