-- Releases claims: a new entry replaces each old one, and wakes a reader of another instance. Claims that another
-- instance has taken over are left alone.
--
-- KEYS    1 stream; then two for each task: record, checkpoint
-- ARGV    1 group; 2 consumer; 3 '1' to remove the consumer if it holds nothing more; 4 life of a checkpoint in ms;
--         5 and 6 the first and the last entry id; then five for each task: entry id, schema version, epoch,
--         entry JSON, checkpoint JSON or ''
-- result  the number of entries that were released
local stream, group, consumer, released = KEYS[1], ARGV[1], ARGV[2], 0
local list, owned_set = owned(stream, group, consumer, ARGV[5], ARGV[6])
if not list then list, owned_set = {}, {} end
for i = 0, (#KEYS - 1) / 2 - 1 do
  local record, checkpoint, at = KEYS[i * 2 + 2], KEYS[i * 2 + 3], 7 + i * 5
  local entry, version, epoch, entry_json, checkpoint_json =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  if (owned_set[entry] or owns(stream, group, consumer, entry, list)) and redis.call('XDEL', stream, entry) == 1 then
    redis.call('XACK', stream, group, entry)
    local new_entry = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
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
return released
