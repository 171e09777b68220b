// SPDX-License-Identifier: MIT
// device/recorder.c: a list of dispatches becomes command buffers. Here live the cut into short submissions, the barriers between
// dispatches (hazards.c says where) and the times taken around them. Does not own pipelines, memory or descriptor sets.
#include "internal.h"

#include "platform.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define PROFILE_MOST 1024u // dispatches in one part while profiling: one query each
#define GROUPS_MOST 65535u // workgroups in y and z that every device takes

#define COMPUTE VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT
#define TRANSFER VK_PIPELINE_STAGE_TRANSFER_BIT

struct entry {
    const char *label;
    uint64_t flops, bytes;
};

// One submission: a command buffer and all that lives as long as it.
struct part {
    VkCommandBuffer cmd;
    VkFence fence;
    struct keel_span mark; // sentinel.c
    VkQueryPool queries; // [0] start, then the end of each dispatch (profiling) or of all; absent without timestamps
    struct set_list sets[N_LAYOUTS]; // by layout_index()
    struct entry *entries; // profiling only
    uint32_t n_entries, cap_entries;
    uint32_t n; // commands that do work
    uint64_t submit_ns;
    double est_ns, kind_ns[MAX_COSTS]; // expected time, and of it each kind's
    bool in_flight;
    bool fresh; // holds the first run of a pipeline: its time says nothing, since CPU drivers compile then
};

struct keel_recorder {
    keel_device *dev;
    bool replay, profile;
    bool ended; // replay: the list is complete
    bool noting; // keel_recorder_note()
    keel_status status;
    VkCommandPool pool;
    keel_heap *marks; // of all parts
    struct part **parts; // replay: the list in order; else a ring of MAX_IN_FLIGHT
    uint32_t n_parts, cap_parts;
    uint32_t used;     // replay: parts of the list; else parts begun since creation
    struct part *open; // being recorded
    VkPipeline bound;
    struct hazards hazards;
    uint64_t last_done_ns;
};

static void fail(keel_recorder *rec, keel_status st)
{
    if (rec->status == KEEL_OK) {
        rec->status = st;
    }
}

static bool vk_ok(keel_recorder *rec, VkResult r, const char *what)
{
    if (r != VK_SUCCESS) {
        fail(rec, keel_vk_failed(rec->dev, r, what));
    }
    return r == VK_SUCCESS;
}

// --- parts ---------------------------------------------------------------------------------------

static void free_part(keel_device *dev, struct part *p)
{
    for (uint32_t n = 0; n < N_LAYOUTS; ++n) {
        keel_sets_free(dev, &p->sets[n]);
    }
    dev->vk.vkDestroyQueryPool(dev->handle, p->queries, NULL);
    dev->vk.vkDestroyFence(dev->handle, p->fence, NULL);
    free(p->entries);
    free(p);
}

static struct part *new_part(keel_recorder *rec)
{
    keel_device *dev = rec->dev;
    struct part *p = calloc(1, sizeof(*p));
    if (!p) {
        KEEL_ERROR(dev->log, "out of host memory while recording");
        fail(rec, KEEL_ERR_NO_MEMORY);
        return NULL;
    }
    const VkCommandBufferAllocateInfo cmd = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO, .commandPool = rec->pool,
                                             .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY, .commandBufferCount = 1};
    const VkFenceCreateInfo fence = {.sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO};
    const VkQueryPoolCreateInfo queries = {.sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
                                           .queryType = VK_QUERY_TYPE_TIMESTAMP,
                                           .queryCount = rec->profile ? PROFILE_MOST + 1 : 2};
    VkResult r = dev->vk.vkAllocateCommandBuffers(dev->handle, &cmd, &p->cmd);
    if (r == VK_SUCCESS) {
        r = dev->vk.vkCreateFence(dev->handle, &fence, NULL, &p->fence);
    }
    if (r == VK_SUCCESS && dev->caps.timestamps) {
        r = dev->vk.vkCreateQueryPool(dev->handle, &queries, NULL, &p->queries);
    }
    if (!vk_ok(rec, r, "preparing a submission")) {
        free_part(dev, p);
        return NULL;
    }
    const keel_status st = keel_sentinel_alloc(dev, &rec->marks, rec->n_parts, &p->mark);
    if (st != KEEL_OK) {
        fail(rec, st);
        free_part(dev, p);
        return NULL;
    }
    return p;
}

// The part to record next, idle. NULL on failure.
static struct part *next_part(keel_recorder *rec)
{
    if (!rec->replay && rec->n_parts == MAX_IN_FLIGHT) {
        return rec->parts[rec->used++ % MAX_IN_FLIGHT];
    }
    if (rec->used < rec->n_parts) {
        return rec->parts[rec->used++];
    }
    if (rec->n_parts == rec->cap_parts) {
        const uint32_t cap = rec->cap_parts ? 2 * rec->cap_parts : 4;
        struct part **parts = realloc(rec->parts, cap * sizeof(struct part *));
        if (!parts) {
            KEEL_ERROR(rec->dev->log, "out of host memory while recording");
            fail(rec, KEEL_ERR_NO_MEMORY);
            return NULL;
        }
        rec->parts = parts;
        rec->cap_parts = cap;
    }
    struct part *p = new_part(rec);
    if (p) {
        rec->parts[rec->n_parts++] = p;
        ++rec->used;
    }
    return p;
}

// --- cost ----------------------------------------------------------------------------------------

uint64_t keel_recorder_quantum(const keel_recorder *rec, const char *label)
{
    struct cost_model *m = &rec->dev->cost;
    const double flops = TARGET_NS * 1e6 / keel_cost_ns(m, keel_cost_find(m, label, 1000000, 0), 1000000, 0);
    return flops > 1e6 ? (uint64_t)flops : 1000000u;
}

// --- submission ----------------------------------------------------------------------------------

// Adds the time that a submission was at work. The first timestamp of one may be taken while the one before still runs.
static void book_busy(keel_device *dev, double start_ns, double ns)
{
    const double end = start_ns + ns, from = KEEL_MAX(start_ns, dev->busy_until_ns);
    const bool wrapped = start_ns + 60e9 < dev->busy_until_ns; // counters of few bits start anew
    dev->busy_ns += wrapped ? (uint64_t)ns : end > from ? (uint64_t)(end - from) : 0;
    dev->busy_until_ns = end;
}

// Books a finished part, with the timestamps `t` around its dispatches unless NULL.
static void profile_part(keel_device *dev, const struct part *p, const uint64_t *t, uint64_t done_ns)
{
    const double tick = dev->caps.timestamp_ns;
    const uint64_t submission = ++dev->profile.n_submissions;
    keel_profile_add(dev, (struct keel_profile_event){.start_ns = p->submit_ns, .ns = done_ns - p->submit_ns, .submission = submission});
    if (t) {
        keel_profile_set_clock(dev, (double)t[0] * tick, p->submit_ns);
    }
    for (uint32_t i = 0; i < p->n_entries; ++i) {
        const struct entry *e = &p->entries[i];
        const uint64_t ticks = t ? (t[i + 1] - t[i]) & dev->timestamp_mask : 0;
        keel_profile_add(dev, (struct keel_profile_event){.label = e->label, .start_ns = t ? (uint64_t)((double)t[i] * tick) : 0,
                                                          .ns = (uint64_t)((double)ticks * tick), .flops = e->flops, .bytes = e->bytes,
                                                          .submission = submission});
    }
}

static void account(keel_recorder *rec, struct part *p)
{
    keel_device *dev = rec->dev;
    uint64_t t[PROFILE_MOST + 1], ns = 0;
    const uint64_t now = keel_now_ns();
    const uint32_t n = rec->profile ? p->n_entries + 1 : 2;
    bool timed = p->queries != VK_NULL_HANDLE;
    if (timed) {
        const VkResult r = dev->vk.vkGetQueryPoolResults(dev->handle, p->queries, 0, n, n * sizeof(t[0]), t, sizeof(t[0]),
                                                         VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT);
        timed = vk_ok(rec, r, "reading times");
    }
    if (timed) {
        ns = (uint64_t)((double)((t[n - 1] - t[0]) & dev->timestamp_mask) * dev->caps.timestamp_ns);
        book_busy(dev, (double)t[0] * dev->caps.timestamp_ns, (double)ns);
    } else {
        ns = now - KEEL_MAX(p->submit_ns, rec->last_done_ns);
        dev->busy_ns += ns;
    }
    if (rec->profile) {
        profile_part(dev, p, timed ? t : NULL, now);
    }
    rec->last_done_ns = now;
    if (!p->fresh) {
        dev->longest_ns = KEEL_MAX(dev->longest_ns, ns);
        keel_cost_learn(&dev->cost, p->kind_ns, dev->cost.n, (double)ns);
    }
    p->fresh = false; // from the second replay on
}

static void wait_part(keel_recorder *rec, struct part *p)
{
    keel_device *dev = rec->dev;
    if (!p->in_flight) {
        return;
    }
    const keel_status st = keel_wait_fence(dev, p->fence, "a submission");
    p->in_flight = false;
    if (st != KEEL_OK) {
        fail(rec, st);
        return;
    }
    (void)dev->vk.vkResetFences(dev->handle, 1, &p->fence);
    const keel_status ran = keel_sentinel_check(dev, p->mark);
    if (ran != KEEL_OK) {
        fail(rec, ran);
        return;
    }
    account(rec, p);
}

static void submit_part(keel_recorder *rec, struct part *p)
{
    keel_device *dev = rec->dev;
    const VkSubmitInfo info = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO, .commandBufferCount = 1, .pCommandBuffers = &p->cmd};
    if (dev->lost) {
        fail(rec, KEEL_ERR_DEVICE_LOST);
        return;
    }
    keel_sentinel_clear(dev, p->mark);
    p->submit_ns = keel_now_ns();
    const VkSubmitInfo nothing = {.sType = VK_STRUCTURE_TYPE_SUBMIT_INFO};
    const bool drop = keel_fault_submission(dev, FAULT_DROP), lost = keel_fault_submission(dev, FAULT_LOST);
    const VkResult r = lost ? VK_ERROR_DEVICE_LOST : dev->vk.vkQueueSubmit(dev->queue, 1, drop ? &nothing : &info, p->fence);
    if (vk_ok(rec, r, "a submission")) {
        p->in_flight = true;
        dev->n_dispatches += p->n;
        ++dev->n_submits;
    }
}

static void begin_part(keel_recorder *rec)
{
    keel_device *dev = rec->dev;
    const VkCommandBufferBeginInfo begin = {.sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                            .flags = rec->replay ? 0 : VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT};
    struct part *p = next_part(rec);
    if (!p) {
        return;
    }
    wait_part(rec, p);
    for (uint32_t n = 0; n < N_LAYOUTS; ++n) {
        p->sets[n].used = 0;
    }
    p->n = p->n_entries = 0;
    p->est_ns = 0.0;
    memset(p->kind_ns, 0, sizeof(p->kind_ns));
    p->fresh = false;
    rec->bound = VK_NULL_HANDLE;
    keel_hazards_clear(&rec->hazards);
    if (rec->status != KEEL_OK || !vk_ok(rec, dev->vk.vkBeginCommandBuffer(p->cmd, &begin), "starting to record")) {
        return;
    }
    if (p->queries) {
        dev->vk.vkCmdResetQueryPool(p->cmd, p->queries, 0, rec->profile ? PROFILE_MOST + 1 : 2);
        dev->vk.vkCmdWriteTimestamp(p->cmd, VK_PIPELINE_STAGE_TOP_OF_PIPE_BIT, p->queries, 0);
    }
    rec->open = p;
}

// Ends the open part. What it wrote becomes visible to all later work and to the host, so every part starts with no hazard.
static void end_part(keel_recorder *rec)
{
    keel_device *dev = rec->dev;
    struct part *p = rec->open;
    const VkMemoryBarrier all = {
        .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER, .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
        .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_READ_BIT
            | VK_ACCESS_TRANSFER_WRITE_BIT | VK_ACCESS_HOST_READ_BIT};
    rec->open = NULL;
    if (!p) {
        return;
    }
    dev->vk.vkCmdPipelineBarrier(p->cmd, COMPUTE | TRANSFER, COMPUTE | TRANSFER | VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &all, 0, NULL,
                                 0, NULL);
    keel_sentinel_record(dev, p->cmd, p->mark);
    if (p->queries && !rec->profile) {
        dev->vk.vkCmdWriteTimestamp(p->cmd, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, p->queries, 1);
    }
    if (vk_ok(rec, dev->vk.vkEndCommandBuffer(p->cmd), "ending a recording") && rec->status == KEEL_OK && !rec->replay) {
        submit_part(rec, p);
    }
}

static double expected_ns(const keel_recorder *rec, const char *label, uint64_t flops, uint64_t bytes)
{
    struct cost_model *m = &rec->dev->cost;
    return keel_cost_ns(m, keel_cost_find(m, label, flops, bytes), flops, bytes);
}

// Makes sure a part is open that may take work of this cost; cuts where the open one has enough.
static bool prepare(keel_recorder *rec, const char *label, uint64_t flops, uint64_t bytes)
{
    const double est = expected_ns(rec, label, flops, bytes);
    struct part *p = rec->open;
    if (rec->status != KEEL_OK) {
        return false;
    }
    if (rec->ended) {
        KEEL_ERROR(rec->dev->log, "recording into a list that was already submitted for replay; reset the recorder first");
        fail(rec, KEEL_ERR_ARG);
        return false;
    }
    if (p && p->n > 0 && (p->est_ns + est > TARGET_NS || (rec->profile && p->n_entries == PROFILE_MOST))) {
        end_part(rec);
    }
    if (rec->status == KEEL_OK && !rec->open) {
        begin_part(rec);
    }
    return rec->status == KEEL_OK && rec->open;
}

// Books a command that was just recorded.
static void book(keel_recorder *rec, const char *label, uint64_t flops, uint64_t bytes)
{
    struct part *p = rec->open;
    const double est = expected_ns(rec, label, flops, bytes);
    p->est_ns += est;
    p->kind_ns[keel_cost_find(&rec->dev->cost, label, flops, bytes)] += est;
    ++p->n;
    if (!rec->profile) {
        return;
    }
    if (p->n_entries == p->cap_entries) {
        const uint32_t cap = p->cap_entries ? 2 * p->cap_entries : 128;
        struct entry *e = realloc(p->entries, cap * sizeof(*e));
        if (!e) {
            KEEL_ERROR(rec->dev->log, "out of host memory while recording");
            fail(rec, KEEL_ERR_NO_MEMORY);
            return;
        }
        p->entries = e;
        p->cap_entries = cap;
    }
    p->entries[p->n_entries++] = (struct entry){.label = label, .flops = flops, .bytes = bytes};
    if (p->queries) {
        rec->dev->vk.vkCmdWriteTimestamp(p->cmd, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, p->queries, p->n_entries);
    }
}

// --- barriers ------------------------------------------------------------------------------------

// Orders the coming command after all recorded before it where it must be, and remembers its own ranges.
static void order(keel_recorder *rec, const struct keel_bind *binds, uint32_t n, VkPipelineStageFlags stage)
{
    struct hazards *h = &rec->hazards;
    if (keel_hazards_meet(h, binds, n)) {
        const VkMemoryBarrier barrier = {
            .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
            .srcAccessMask = (h->stages & COMPUTE ? VK_ACCESS_SHADER_WRITE_BIT : 0)
                | (h->stages & TRANSFER ? VK_ACCESS_TRANSFER_WRITE_BIT : 0),
            .dstAccessMask = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_READ_BIT
                | VK_ACCESS_TRANSFER_WRITE_BIT};
        rec->dev->vk.vkCmdPipelineBarrier(rec->open->cmd, h->stages, COMPUTE | TRANSFER, 0, 1, &barrier, 0, NULL, 0, NULL);
        ++rec->dev->n_barriers;
        keel_hazards_clear(h);
    }
    keel_hazards_add(h, binds, n, stage);
}

// --- dispatches ----------------------------------------------------------------------------------

static keel_status check_binds(keel_device *dev, const struct keel_dispatch *d)
{
    keel_status st = KEEL_OK;
    const struct keel_caps *c = &dev->caps;
    for (uint32_t i = 0; i < d->n_bind; ++i) {
        const struct keel_span s = d->bind[i].span;
        if (!s.block || s.bytes == 0 || s.offset > s.block->bytes || s.bytes > s.block->bytes - s.offset) {
            KEEL_FAIL(dev->log, KEEL_ERR_ARG, "%s (shader %s): binding %" PRIu32 " is %s", d->label, d->shader->name, i,
                      !s.block || s.bytes == 0 ? "empty" : "larger than its memory");
        }
        // On every device what the strictest asks for, so that a mistake is seen on all.
        if (s.offset % SPAN_ALIGN != 0 || s.bytes > c->max_range) {
            KEEL_FAIL(dev->log, KEEL_ERR_ARG, "%s (shader %s): binding %" PRIu32 " at offset %" PRIu64 " with %" PRIu64 " bytes; wanted is "
                      "a multiple of %u and, on %s, at most %" PRIu64 " bytes", d->label, d->shader->name, i, s.offset, s.bytes,
                      SPAN_ALIGN, c->name, c->max_range);
        }
    }
    if (d->groups[0] > c->max_groups || d->groups[1] > GROUPS_MOST || d->groups[2] > GROUPS_MOST) {
        KEEL_FAIL(dev->log, KEEL_ERR_ARG, "%s (shader %s): a grid of %" PRIu32 " x %" PRIu32 " x %" PRIu32 " workgroups is above what %s "
                  "takes, %" PRIu32 " in x; split the work or fold it into y", d->label, d->shader->name, d->groups[0], d->groups[1],
                  d->groups[2], c->name, c->max_groups);
    }
out:
    return st;
}

void keel_record(keel_recorder *rec, const struct keel_dispatch *d)
{
    keel_device *dev = rec->dev;
    struct pipeline *p = NULL;
    if (rec->status != KEEL_OK || d->groups[0] == 0 || d->groups[1] == 0 || d->groups[2] == 0) {
        return;
    }
    keel_status st = check_binds(dev, d);
    if (st == KEEL_OK) {
        st = rec->noting ? keel_pipeline_find(dev, d, &p) : keel_pipeline_get(dev, d, &p);
    }
    if (st == KEEL_OK && rec->noting) {
        return;
    }
    if (st == KEEL_OK && (d->push_bytes < p->push_bytes || d->push_bytes > KEEL_MAX_PUSH || d->push_bytes % 4 != 0)) {
        KEEL_ERROR(dev->log, "%s (shader %s): %" PRIu32 " bytes of push constants given, the shader reads %" PRIu32, d->label,
                   d->shader->name, d->push_bytes, p->push_bytes);
        st = KEEL_ERR_ARG;
    }
    if (st != KEEL_OK) {
        fail(rec, st);
        return;
    }
    if (keel_fault_shader(dev, FAULT_SKIP, d->shader->name) || !prepare(rec, d->label, d->flops, d->bytes)) {
        return;
    }
    const VkCommandBuffer cmd = rec->open->cmd;
    if (d->n_bind > 0) {
        VkDescriptorSet set = VK_NULL_HANDLE;
        const uint32_t layout = layout_index(d->n_bind, p->texel);
        st = keel_sets_next(dev, &rec->open->sets[layout], layout, d, p, &set);
        if (st != KEEL_OK) {
            fail(rec, st);
            return;
        }
        dev->vk.vkCmdBindDescriptorSets(cmd, VK_PIPELINE_BIND_POINT_COMPUTE, p->layout, 0, 1, &set, 0, NULL);
    }
    order(rec, d->bind, d->n_bind, COMPUTE);
    rec->open->fresh = rec->open->fresh || !p->ran;
    p->ran = true;
    if (rec->bound != p->handle) {
        dev->vk.vkCmdBindPipeline(cmd, VK_PIPELINE_BIND_POINT_COMPUTE, p->handle);
        rec->bound = p->handle;
    }
    if (d->push_bytes > 0) {
        dev->vk.vkCmdPushConstants(cmd, p->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, d->push_bytes, d->push);
    }
    dev->vk.vkCmdDispatch(cmd, d->groups[0], d->groups[1], d->groups[2]);
    book(rec, d->label, d->flops, d->bytes);
}

void keel_record_fill(keel_recorder *rec, struct keel_span dst, uint32_t word)
{
    const struct keel_bind bind = {.span = dst, .access = KEEL_WRITE};
    KEEL_ASSERT(dst.offset % 4 == 0 && dst.bytes % 4 == 0);
    if (dst.bytes == 0 || rec->noting || !prepare(rec, "fill", 0, dst.bytes)) {
        return;
    }
    order(rec, &bind, 1, TRANSFER);
    rec->dev->vk.vkCmdFillBuffer(rec->open->cmd, dst.block->buffer, dst.offset, dst.bytes, word);
    book(rec, "fill", 0, dst.bytes);
}

void keel_record_copy(keel_recorder *rec, struct keel_span dst, struct keel_span src)
{
    const struct keel_bind binds[] = {{.span = src, .access = KEEL_READ}, {.span = dst, .access = KEEL_WRITE}};
    const VkBufferCopy copy = {.srcOffset = src.offset, .dstOffset = dst.offset, .size = src.bytes};
    KEEL_ASSERT(dst.bytes == src.bytes);
    if (src.bytes == 0 || rec->noting || !prepare(rec, "copy", 0, 2 * src.bytes)) {
        return;
    }
    order(rec, binds, 2, TRANSFER);
    rec->dev->vk.vkCmdCopyBuffer(rec->open->cmd, src.block->buffer, dst.block->buffer, 1, &copy);
    book(rec, "copy", 0, 2 * src.bytes);
}

// --- life ----------------------------------------------------------------------------------------

keel_status keel_recorder_create(keel_recorder **out, keel_device *dev, const struct keel_recorder_params *params)
{
    keel_status st = KEEL_OK;
    keel_recorder *rec = NULL;
    *out = NULL;
    rec = calloc(1, sizeof(*rec));
    if (!rec) {
        KEEL_FAIL(dev->log, KEEL_ERR_NO_MEMORY, "out of host memory for a recorder");
    }
    rec->dev = dev;
    rec->replay = params && params->replay;
    rec->profile = dev->profile.on;
    const VkCommandPoolCreateInfo info = {.sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                          .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                          .queueFamilyIndex = dev->family};
    const VkResult r = dev->vk.vkCreateCommandPool(dev->handle, &info, NULL, &rec->pool);
    if (r != VK_SUCCESS) {
        rec->pool = VK_NULL_HANDLE;
        st = keel_vk_failed(dev, r, "making a command pool");
        goto out;
    }
    *out = rec;
    rec = NULL;
out:
    free(rec);
    return st;
}

keel_device *keel_recorder_device(const keel_recorder *rec)
{
    return rec->dev;
}

void keel_recorder_fail(keel_recorder *rec, keel_status status)
{
    fail(rec, status);
}

static void wait_all(keel_recorder *rec)
{
    // Oldest first, so that each time is counted from the end of the one before.
    const uint32_t first = !rec->replay && rec->n_parts == MAX_IN_FLIGHT ? rec->used % MAX_IN_FLIGHT : 0;
    for (uint32_t i = 0; i < rec->n_parts; ++i) {
        wait_part(rec, rec->parts[(first + i) % rec->n_parts]);
    }
}

static void submit_list(keel_recorder *rec)
{
    for (uint32_t i = 0; i < rec->used && rec->status == KEEL_OK; ++i) {
        submit_part(rec, rec->parts[i]);
    }
}

void keel_recorder_note(keel_recorder *rec, bool on)
{
    if (rec->noting && !on && rec->status == KEEL_OK) {
        keel_pipelines_compile(rec->dev);
    }
    rec->noting = on;
}

keel_status keel_recorder_submit(keel_recorder *rec)
{
    end_part(rec);
    if (rec->replay && !rec->ended && rec->status == KEEL_OK) {
        rec->ended = true;
        submit_list(rec);
    }
    return rec->status;
}

keel_status keel_recorder_wait(keel_recorder *rec)
{
    wait_all(rec);
    return rec->status;
}

keel_status keel_recorder_replay(keel_recorder *rec)
{
    if (!rec->replay || !rec->ended) {
        KEEL_ERROR(rec->dev->log, "replay needs a recorder made for it, and its list submitted once");
        fail(rec, KEEL_ERR_ARG);
        return rec->status;
    }
    wait_all(rec);
    submit_list(rec);
    return rec->status;
}

void keel_recorder_reset(keel_recorder *rec)
{
    if (rec->open) {
        (void)rec->dev->vk.vkEndCommandBuffer(rec->open->cmd);
        rec->open = NULL;
    }
    wait_all(rec);
    rec->ended = false;
    rec->used = 0;
    rec->status = rec->dev->lost ? KEEL_ERR_DEVICE_LOST : KEEL_OK;
    keel_hazards_clear(&rec->hazards);
}

void keel_recorder_destroy(keel_recorder **prec)
{
    keel_recorder *rec = prec ? *prec : NULL;
    if (!rec) {
        return;
    }
    *prec = NULL;
    keel_recorder_reset(rec);
    for (uint32_t i = 0; i < rec->n_parts; ++i) {
        free_part(rec->dev, rec->parts[i]);
    }
    rec->dev->vk.vkDestroyCommandPool(rec->dev->handle, rec->pool, NULL);
    keel_heap_destroy(&rec->marks);
    free(rec->parts);
    free(rec);
}
