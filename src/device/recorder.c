// SPDX-License-Identifier: MIT
// device/recorder.c: turns a list of dispatches into command buffers: descriptor sets, derived barriers, short submissions.
// Owns the choice of where a submission ends. Does not know what a dispatch computes.
#include "internal.h"

#include "platform.h"

#include <stdlib.h>
#include <string.h>

#define SETS_PER_POOL 256
#define MAX_TOUCHED 192        // spans remembered since the last barrier; more: a barrier, which is always right
#define QUERIES_PER_SEGMENT 512
#define FIRST_NS 10000000u     // the first submission is short, so that the device starts early

// One command buffer and what is known of it.
struct segment {
    VkCommandBuffer cmd;
    VkFence fence;
    VkQueryPool queries; // null unless profiled
    uint32_t n_timed;
    struct keel_profile_row timed[QUERIES_PER_SEGMENT / 2];
    uint64_t flops, bytes, submitted_ns;
    uint32_t n; // commands in it
    bool in_flight;
};

struct touched {
    struct keel_block *block;
    uint64_t begin, end;
};

struct keel_recorder {
    keel_device *dev;
    bool replay, profiled;
    keel_status st;
    VkCommandPool pool;
    VkDescriptorPool *sets;
    uint32_t n_sets, cap_sets; // pools
    uint32_t set_pool, set_used; // pool being filled, sets taken from it
    struct segment **seg;
    uint32_t n_seg, cap_seg; // segments made so far
    uint32_t first, open;    // [first, open) are submitted; open is being recorded (n_open counts it)
    bool recording;
    struct touched reads[MAX_TOUCHED], writes[MAX_TOUCHED];
    uint32_t n_reads, n_writes;
};

// --- estimates -----------------------------------------------------------------------------------

static double estimate_ns(const keel_device *dev, uint64_t flops, uint64_t bytes)
{
    return 1e9 * ((double)flops / dev->rate_flops + (double)bytes / dev->rate_bytes);
}

// Moves the rates towards what a submission took. Only long ones tell something; both rates move together, since one
// number cannot tell them apart.
static void learn(keel_device *dev, const struct segment *s, uint64_t ns)
{
    const double guess = estimate_ns(dev, s->flops, s->bytes);
    if (ns < 2000000 || guess < 1000.0) {
        return;
    }
    double ratio = guess / (double)ns;
    ratio = KEEL_MIN(KEEL_MAX(ratio, 0.25), 4.0);
    const double step = 1.0 + 0.3 * (ratio - 1.0);
    dev->rate_flops = KEEL_MIN(KEEL_MAX(dev->rate_flops * step, 2e7), 1e15);
    dev->rate_bytes = KEEL_MIN(KEEL_MAX(dev->rate_bytes * step, 2e7), 1e14);
}

uint64_t keel_recorder_quantum(const keel_recorder *rec)
{
    const double flops = rec->dev->rate_flops * (TARGET_NS * 1e-9);
    return flops > 1e6 ? (uint64_t)flops : 1000000u;
}

// --- life ----------------------------------------------------------------------------------------

keel_status keel_recorder_create(keel_recorder **out, keel_device *dev, const struct keel_recorder_params *params)
{
    keel_status st = KEEL_OK;
    keel_recorder *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r) {
        KEEL_FAIL(dev->log, KEEL_ERR_NO_MEMORY, "out of memory for a list of device work");
    }
    r->dev = dev;
    r->replay = params && params->replay;
    r->profiled = dev->profile.on;
    const VkCommandPoolCreateInfo info = { .sType = VK_STRUCTURE_TYPE_COMMAND_POOL_CREATE_INFO,
                                           .flags = VK_COMMAND_POOL_CREATE_RESET_COMMAND_BUFFER_BIT,
                                           .queueFamilyIndex = dev->family };
    const VkResult res = dev->vk.vkCreateCommandPool(dev->handle, &info, NULL, &r->pool);
    if (res != VK_SUCCESS) {
        KEEL_TRY(keel_vk_failed(dev, res, "creating a command pool"));
    }
    *out = r;
    r = NULL;
out:
    free(r);
    return st;
}

void keel_recorder_destroy(keel_recorder **prec)
{
    keel_recorder *r = prec ? *prec : NULL;
    if (!r) {
        return;
    }
    keel_recorder_wait(r);
    for (uint32_t i = 0; i < r->n_seg; i++) {
        r->dev->vk.vkDestroyFence(r->dev->handle, r->seg[i]->fence, NULL);
        r->dev->vk.vkDestroyQueryPool(r->dev->handle, r->seg[i]->queries, NULL);
        free(r->seg[i]);
    }
    for (uint32_t i = 0; i < r->n_sets; i++) {
        r->dev->vk.vkDestroyDescriptorPool(r->dev->handle, r->sets[i], NULL);
    }
    r->dev->vk.vkDestroyCommandPool(r->dev->handle, r->pool, NULL); // frees the command buffers
    free(r->seg);
    free(r->sets);
    free(r);
    *prec = NULL;
}

keel_device *keel_recorder_device(const keel_recorder *rec)
{
    return rec->dev;
}

void keel_recorder_fail(keel_recorder *rec, keel_status status)
{
    if (rec->st == KEEL_OK) {
        rec->st = status;
    }
}

static bool check(keel_recorder *r, VkResult res, const char *what)
{
    if (res != VK_SUCCESS) {
        keel_recorder_fail(r, keel_vk_failed(r->dev, res, what));
    }
    return res == VK_SUCCESS;
}

// --- segments ------------------------------------------------------------------------------------

static bool new_segment(keel_recorder *r)
{
    keel_device *dev = r->dev;
    struct segment *s = calloc(1, sizeof *s);
    if (s && r->n_seg == r->cap_seg) {
        const uint32_t cap = KEEL_MAX(r->cap_seg * 2, 8u);
        struct segment **p = realloc(r->seg, cap * sizeof *p);
        if (p) {
            r->seg = p;
            r->cap_seg = cap;
        }
    }
    if (!s || r->n_seg == r->cap_seg) {
        free(s);
        KEEL_ERROR(dev->log, "out of memory for a list of device work");
        keel_recorder_fail(r, KEEL_ERR_NO_MEMORY);
        return false;
    }
    r->seg[r->n_seg++] = s;
    const VkCommandBufferAllocateInfo alloc = { .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_ALLOCATE_INFO, .commandPool = r->pool,
                                                .level = VK_COMMAND_BUFFER_LEVEL_PRIMARY, .commandBufferCount = 1 };
    const VkFenceCreateInfo fence = { .sType = VK_STRUCTURE_TYPE_FENCE_CREATE_INFO };
    const VkQueryPoolCreateInfo query = { .sType = VK_STRUCTURE_TYPE_QUERY_POOL_CREATE_INFO,
                                          .queryType = VK_QUERY_TYPE_TIMESTAMP, .queryCount = QUERIES_PER_SEGMENT };
    return check(r, dev->vk.vkAllocateCommandBuffers(dev->handle, &alloc, &s->cmd), "allocating a command buffer") &&
           check(r, dev->vk.vkCreateFence(dev->handle, &fence, NULL, &s->fence), "creating a fence") &&
           (!r->profiled || !dev->caps.timestamps ||
            check(r, dev->vk.vkCreateQueryPool(dev->handle, &query, NULL, &s->queries), "creating timestamps"));
}

static void barrier(keel_recorder *r, VkCommandBuffer cmd)
{
    const VkAccessFlags all = VK_ACCESS_SHADER_READ_BIT | VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_READ_BIT |
                              VK_ACCESS_TRANSFER_WRITE_BIT;
    const VkPipelineStageFlags stages = VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT;
    const VkMemoryBarrier mb = { .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                                 .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                                 .dstAccessMask = all };
    r->dev->vk.vkCmdPipelineBarrier(cmd, stages, stages, 0, 1, &mb, 0, NULL, 0, NULL);
    r->dev->n_barriers++;
    r->n_reads = r->n_writes = 0;
}

// Begins recording into the next segment if none is open.
static struct segment *open_segment(keel_recorder *r)
{
    if (r->recording) {
        return r->seg[r->open];
    }
    if (r->open == r->n_seg && !new_segment(r)) {
        return NULL;
    }
    struct segment *s = r->seg[r->open];
    const VkCommandBufferBeginInfo begin = { .sType = VK_STRUCTURE_TYPE_COMMAND_BUFFER_BEGIN_INFO,
                                             .flags = r->replay ? 0 : VK_COMMAND_BUFFER_USAGE_ONE_TIME_SUBMIT_BIT };
    s->flops = s->bytes = 0;
    s->n = s->n_timed = 0;
    if (!check(r, r->dev->vk.vkBeginCommandBuffer(s->cmd, &begin), "beginning a command buffer")) {
        return NULL;
    }
    if (s->queries) {
        r->dev->vk.vkCmdResetQueryPool(s->cmd, s->queries, 0, QUERIES_PER_SEGMENT);
    }
    r->recording = true;
    barrier(r, s->cmd); // work of earlier submissions is ordered, not yet visible
    return s;
}

static void submit_segment(keel_recorder *r, struct segment *s)
{
    keel_device *dev = r->dev;
    const VkSubmitInfo info = { .sType = VK_STRUCTURE_TYPE_SUBMIT_INFO, .commandBufferCount = 1, .pCommandBuffers = &s->cmd };
    s->submitted_ns = keel_now_ns();
    if (check(r, dev->vk.vkQueueSubmit(dev->queue, 1, &info, s->fence), "submitting work")) {
        s->in_flight = true;
        dev->n_submits++;
    }
}

// Ends the open segment; outside replay mode also submits it.
static void close_segment(keel_recorder *r)
{
    if (!r->recording) {
        return;
    }
    struct segment *s = r->seg[r->open];
    const VkMemoryBarrier mb = { .sType = VK_STRUCTURE_TYPE_MEMORY_BARRIER,
                                 .srcAccessMask = VK_ACCESS_SHADER_WRITE_BIT | VK_ACCESS_TRANSFER_WRITE_BIT,
                                 .dstAccessMask = VK_ACCESS_HOST_READ_BIT };
    r->dev->vk.vkCmdPipelineBarrier(s->cmd, VK_PIPELINE_STAGE_COMPUTE_SHADER_BIT | VK_PIPELINE_STAGE_TRANSFER_BIT,
                                    VK_PIPELINE_STAGE_HOST_BIT, 0, 1, &mb, 0, NULL, 0, NULL);
    r->recording = false;
    if (check(r, r->dev->vk.vkEndCommandBuffer(s->cmd), "ending a command buffer") && !r->replay && r->st == KEEL_OK) {
        submit_segment(r, s);
    }
    r->open++;
}

static void add_times(keel_recorder *r, struct segment *s)
{
    uint64_t ticks[QUERIES_PER_SEGMENT];
    keel_device *dev = r->dev;
    const bool timed = s->queries && s->n_timed > 0 &&
                       dev->vk.vkGetQueryPoolResults(dev->handle, s->queries, 0, 2 * s->n_timed, sizeof ticks, ticks, sizeof *ticks,
                                                     VK_QUERY_RESULT_64_BIT | VK_QUERY_RESULT_WAIT_BIT) == VK_SUCCESS;
    for (uint32_t i = 0; i < s->n_timed; i++) {
        const uint64_t d = timed ? (ticks[2 * i + 1] - ticks[2 * i]) & dev->timestamp_mask : 0;
        keel_profile_add(dev, s->timed[i].label, (uint64_t)((double)d * dev->caps.timestamp_ns), s->timed[i].flops,
                         s->timed[i].bytes);
    }
}

// Waits for a segment, keeps the books. `previous_done`: when the one before was seen done.
static uint64_t finish_segment(keel_recorder *r, struct segment *s, uint64_t previous_done)
{
    if (!s->in_flight) {
        return previous_done;
    }
    s->in_flight = false;
    const keel_status st = keel_wait_fence(r->dev, s->fence, "work on the device");
    const uint64_t now = keel_now_ns();
    if (st != KEEL_OK) {
        keel_recorder_fail(r, st);
        return now;
    }
    check(r, r->dev->vk.vkResetFences(r->dev->handle, 1, &s->fence), "resetting a fence");
    // It ran from when it was handed in, or from when the one before it ended.
    const uint64_t ns = now - KEEL_MAX(s->submitted_ns, previous_done);
    r->dev->longest_ns = KEEL_MAX(r->dev->longest_ns, ns);
    learn(r->dev, s, ns);
    add_times(r, s);
    return now;
}

// Keeps at most MAX_IN_FLIGHT - 1 submissions waiting before the next one is recorded.
static void throttle(keel_recorder *r)
{
    static const uint32_t keep = MAX_IN_FLIGHT - 1;
    uint64_t done = 0;
    while (!r->replay && r->open - r->first > keep) {
        done = finish_segment(r, r->seg[r->first], done);
        r->first++;
    }
}

// --- hazards -------------------------------------------------------------------------------------

static bool overlaps(const struct touched *list, uint32_t n, struct keel_span s)
{
    for (uint32_t i = 0; i < n; i++) {
        if (list[i].block == s.block && list[i].begin < s.offset + s.bytes && s.offset < list[i].end) {
            return true;
        }
    }
    return false;
}

static void remember(struct touched *list, uint32_t *n, struct keel_span s)
{
    for (uint32_t i = 0; i < *n; i++) { // the same tensor is read again and again
        if (list[i].block == s.block && list[i].begin == s.offset && list[i].end == s.offset + s.bytes) {
            return;
        }
    }
    list[(*n)++] = (struct touched){ s.block, s.offset, s.offset + s.bytes };
}

// Puts a barrier before a command that uses `binds`, if it needs one, and remembers its use.
static void order(keel_recorder *r, VkCommandBuffer cmd, const struct keel_bind *binds, uint32_t n)
{
    bool hazard = r->n_reads + n > MAX_TOUCHED || r->n_writes + n > MAX_TOUCHED;
    for (uint32_t i = 0; i < n && !hazard; i++) {
        hazard = overlaps(r->writes, r->n_writes, binds[i].span) ||
                 (binds[i].access != KEEL_READ && overlaps(r->reads, r->n_reads, binds[i].span));
    }
    if (hazard) {
        barrier(r, cmd);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (binds[i].access != KEEL_WRITE) {
            remember(r->reads, &r->n_reads, binds[i].span);
        }
        if (binds[i].access != KEEL_READ) {
            remember(r->writes, &r->n_writes, binds[i].span);
        }
    }
}

// --- commands ------------------------------------------------------------------------------------

// A new descriptor set of `n` storage buffers.
static VkDescriptorSet new_set(keel_recorder *r, uint32_t n)
{
    keel_device *dev = r->dev;
    VkDescriptorSet set = VK_NULL_HANDLE;
    if (r->set_used == SETS_PER_POOL) {
        r->set_pool++;
        r->set_used = 0;
    }
    if (r->set_pool == r->n_sets) {
        if (r->n_sets == r->cap_sets) {
            const uint32_t cap = KEEL_MAX(r->cap_sets * 2, 8u);
            VkDescriptorPool *p = realloc(r->sets, cap * sizeof *p);
            if (!p) {
                KEEL_ERROR(dev->log, "out of memory for descriptor sets");
                keel_recorder_fail(r, KEEL_ERR_NO_MEMORY);
                return VK_NULL_HANDLE;
            }
            r->sets = p;
            r->cap_sets = cap;
        }
        const VkDescriptorPoolSize size = { VK_DESCRIPTOR_TYPE_STORAGE_BUFFER, SETS_PER_POOL * KEEL_MAX_BINDS };
        const VkDescriptorPoolCreateInfo info = { .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_POOL_CREATE_INFO, .maxSets = SETS_PER_POOL,
                                                  .poolSizeCount = 1, .pPoolSizes = &size };
        if (!check(r, dev->vk.vkCreateDescriptorPool(dev->handle, &info, NULL, &r->sets[r->n_sets]), "creating a descriptor pool")) {
            return VK_NULL_HANDLE;
        }
        r->n_sets++;
    }
    const VkDescriptorSetAllocateInfo alloc = { .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_ALLOCATE_INFO,
                                                .descriptorPool = r->sets[r->set_pool], .descriptorSetCount = 1,
                                                .pSetLayouts = &dev->pipelines.set_layouts[n] };
    if (check(r, dev->vk.vkAllocateDescriptorSets(dev->handle, &alloc, &set), "allocating a descriptor set")) {
        r->set_used++;
    }
    return set;
}

static bool bind_fits(keel_recorder *r, const struct keel_dispatch *d)
{
    const struct keel_caps *caps = &r->dev->caps;
    for (uint32_t i = 0; i < d->n_bind; i++) {
        const struct keel_span s = d->bind[i].span;
        if (!s.block || s.bytes == 0 || s.bytes > caps->max_range || s.offset % caps->offset_align != 0 ||
            s.offset + s.bytes > s.block->bytes) {
            KEEL_ERROR(r->dev->log, "%s: binding %u (%llu bytes at %llu) does not fit the device's limit of %llu bytes", d->label, i,
                       (unsigned long long)s.bytes, (unsigned long long)s.offset, (unsigned long long)caps->max_range);
            keel_recorder_fail(r, KEEL_ERR_ARG);
            return false;
        }
    }
    if (d->groups[0] > caps->max_groups || d->groups[1] > 65535 || d->groups[2] > 65535) {
        KEEL_ERROR(r->dev->log, "%s: %u x %u x %u workgroups are more than the device takes", d->label, d->groups[0], d->groups[1],
                   d->groups[2]);
        keel_recorder_fail(r, KEEL_ERR_ARG);
        return false;
    }
    return true;
}

// Ends the segment if this much more work would make it too long. The first of a list is kept short.
static void cut(keel_recorder *r, uint64_t flops, uint64_t bytes)
{
    if (!r->recording) {
        return;
    }
    const struct segment *s = r->seg[r->open];
    const double limit = r->open == 0 && !r->replay ? FIRST_NS : TARGET_NS;
    if (s->n > 0 && (estimate_ns(r->dev, s->flops + flops, s->bytes + bytes) > limit ||
                     (s->queries && s->n_timed == QUERIES_PER_SEGMENT / 2))) {
        close_segment(r);
        throttle(r);
    }
}

static void count(struct segment *s, keel_recorder *r, const struct keel_dispatch *d)
{
    s->flops += d->flops;
    s->bytes += d->bytes;
    s->n++;
    r->dev->n_dispatches++;
}

void keel_record(keel_recorder *r, const struct keel_dispatch *d)
{
    const struct pipeline *p;
    keel_device *dev = r->dev;
    if (r->st != KEEL_OK || d->groups[0] == 0 || d->groups[1] == 0 || d->groups[2] == 0 || !bind_fits(r, d)) {
        return;
    }
    const keel_status st = keel_pipeline_get(dev, d, &p);
    if (st != KEEL_OK) {
        keel_recorder_fail(r, st);
        return;
    }
    cut(r, d->flops, d->bytes);
    struct segment *s = open_segment(r);
    const VkDescriptorSet set = s ? new_set(r, d->n_bind) : VK_NULL_HANDLE;
    if (!set) {
        return;
    }
    VkDescriptorBufferInfo info[KEEL_MAX_BINDS];
    VkWriteDescriptorSet write[KEEL_MAX_BINDS];
    for (uint32_t i = 0; i < d->n_bind; i++) {
        info[i] = (VkDescriptorBufferInfo){ d->bind[i].span.block->buffer, d->bind[i].span.offset, d->bind[i].span.bytes };
        write[i] = (VkWriteDescriptorSet){ .sType = VK_STRUCTURE_TYPE_WRITE_DESCRIPTOR_SET, .dstSet = set, .dstBinding = i,
                                           .descriptorCount = 1, .descriptorType = VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
                                           .pBufferInfo = &info[i] };
    }
    dev->vk.vkUpdateDescriptorSets(dev->handle, d->n_bind, write, 0, NULL);
    order(r, s->cmd, d->bind, d->n_bind);
    dev->vk.vkCmdBindPipeline(s->cmd, VK_PIPELINE_BIND_POINT_COMPUTE, p->handle);
    dev->vk.vkCmdBindDescriptorSets(s->cmd, VK_PIPELINE_BIND_POINT_COMPUTE, p->layout, 0, 1, &set, 0, NULL);
    if (d->push_bytes > 0) {
        dev->vk.vkCmdPushConstants(s->cmd, p->layout, VK_SHADER_STAGE_COMPUTE_BIT, 0, d->push_bytes, d->push);
    }
    if (s->queries) {
        dev->vk.vkCmdWriteTimestamp(s->cmd, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, s->queries, 2 * s->n_timed);
    }
    dev->vk.vkCmdDispatch(s->cmd, d->groups[0], d->groups[1], d->groups[2]);
    if (s->queries) {
        dev->vk.vkCmdWriteTimestamp(s->cmd, VK_PIPELINE_STAGE_BOTTOM_OF_PIPE_BIT, s->queries, 2 * s->n_timed + 1);
    }
    if (r->profiled && s->n_timed < QUERIES_PER_SEGMENT / 2) {
        s->timed[s->n_timed++] = (struct keel_profile_row){ .label = d->label, .flops = d->flops, .bytes = d->bytes };
    }
    count(s, r, d);
}

void keel_record_fill(keel_recorder *r, struct keel_span dst, uint32_t word)
{
    const struct keel_bind bind = { dst, KEEL_WRITE };
    const struct keel_dispatch cost = { .bytes = dst.bytes };
    if (r->st != KEEL_OK || dst.bytes == 0) {
        return;
    }
    cut(r, 0, dst.bytes);
    struct segment *s = open_segment(r);
    if (s) {
        order(r, s->cmd, &bind, 1);
        r->dev->vk.vkCmdFillBuffer(s->cmd, dst.block->buffer, dst.offset, dst.bytes / 4 * 4, word);
        count(s, r, &cost);
    }
}

void keel_record_copy(keel_recorder *r, struct keel_span dst, struct keel_span src)
{
    const struct keel_bind bind[2] = { { src, KEEL_READ }, { dst, KEEL_WRITE } };
    const struct keel_dispatch cost = { .bytes = 2 * dst.bytes };
    if (r->st != KEEL_OK || dst.bytes == 0) {
        return;
    }
    KEEL_ASSERT(dst.bytes == src.bytes);
    cut(r, 0, cost.bytes);
    struct segment *s = open_segment(r);
    if (s) {
        const VkBufferCopy region = { src.offset, dst.offset, dst.bytes };
        order(r, s->cmd, bind, 2);
        r->dev->vk.vkCmdCopyBuffer(s->cmd, src.block->buffer, dst.block->buffer, 1, &region);
        count(s, r, &cost);
    }
}

// --- running -------------------------------------------------------------------------------------

keel_status keel_recorder_submit(keel_recorder *r)
{
    close_segment(r);
    return r->replay ? keel_recorder_replay(r) : r->st;
}

keel_status keel_recorder_replay(keel_recorder *r)
{
    for (uint32_t i = 0; i < r->open && r->st == KEEL_OK; i++) {
        submit_segment(r, r->seg[i]);
    }
    return r->st;
}

keel_status keel_recorder_wait(keel_recorder *r)
{
    uint64_t done = 0;
    for (uint32_t i = r->replay ? 0 : r->first; i < r->open; i++) {
        done = finish_segment(r, r->seg[i], done);
    }
    if (!r->replay && !r->recording) { // all is done: command buffers and sets are free for a new list
        for (uint32_t i = 0; i < r->n_sets; i++) {
            r->dev->vk.vkResetDescriptorPool(r->dev->handle, r->sets[i], 0);
        }
        r->first = r->open = r->set_pool = r->set_used = 0;
    }
    return r->st;
}

void keel_recorder_reset(keel_recorder *r)
{
    if (r->recording) {
        r->dev->vk.vkEndCommandBuffer(r->seg[r->open]->cmd);
        r->recording = false;
    }
    keel_recorder_wait(r);
    for (uint32_t i = 0; i < r->n_sets; i++) {
        r->dev->vk.vkResetDescriptorPool(r->dev->handle, r->sets[i], 0);
    }
    r->first = r->open = r->set_pool = r->set_used = 0;
    r->n_reads = r->n_writes = 0;
    r->st = KEEL_OK;
}
