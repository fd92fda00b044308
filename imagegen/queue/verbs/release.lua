-- Releases claims: a new entry replaces each old one, and wakes a reader of another instance. Claims that another
-- instance has taken over are left alone.
--
-- A claim that was not started has no checkpoint here. One that an earlier owner released with the task moves to the
-- new entry, since a checkpoint of another entry counts for nothing.
--
-- KEYS    1 stream; then two for each task: record, checkpoint
-- ARGV    1 group; 2 consumer; 3 '1' to remove the consumer if it holds nothing more; 4 life of a checkpoint in ms;
--         5 and 6 the first and the last entry id; then five for each task: entry id, schema version, epoch,
--         entry JSON, checkpoint JSON or ''
-- result  the number of entries that were released, and of earlier checkpoints that were moved
local stream, group, consumer, released, moved = KEYS[1], ARGV[1], ARGV[2], 0, 0

-- Returns the checkpoint, without its entry id, that an earlier owner of an entry released; '' if there is none.
local function released_before(key, entry)
  local existing = redis.pcall('GET', key)
  local of_entry, rest = string.match(type(existing) == 'string' and existing or '', '^(%S+) (.*)$')
  if of_entry ~= entry or not string.find(rest, '"phase":"released"', 1, true) then return '' end
  moved = moved + 1
  return rest
end

local list, owned_set = owned(stream, group, consumer, ARGV[5], ARGV[6])
if not list then list, owned_set = {}, {} end
for i = 0, (#KEYS - 1) / 2 - 1 do
  local record, checkpoint, at = KEYS[i * 2 + 2], KEYS[i * 2 + 3], 7 + i * 5
  local entry, version, epoch, entry_json, checkpoint_json =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  if (owned_set[entry] or owns(stream, group, consumer, entry, list)) and redis.call('XDEL', stream, entry) == 1 then
    redis.call('XACK', stream, group, entry)
    local new_entry = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
    if checkpoint_json == '' then checkpoint_json = released_before(checkpoint, entry) end
    if checkpoint_json ~= '' then redis.call('SET', checkpoint, new_entry .. ' ' .. checkpoint_json, 'PX', ARGV[4]) end
    local existing = redis.pcall('GET', record)
    if type(existing) == 'string' then
      local before, after = string.match(existing, '^(%d+ %l+ )%S+( .*)$')
      if before then redis.call('SET', record, before .. new_entry .. after, 'KEEPTTL') end
    end
    released = released + 1
  end
end
if ARGV[3] ~= '' then
  local left = redis.pcall('XPENDING', stream, group, '-', '+', 1, consumer)
  if not left.err and #left == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer) end
end
return {released, moved}
