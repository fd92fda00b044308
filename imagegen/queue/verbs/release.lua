-- Hands claims back: a new entry takes the place of each old one, which wakes a reader elsewhere at once. What
-- another has taken over stays with it.
--
-- KEYS  1 stream; then two a task: record, run
-- ARGV  1 group; 2 consumer; 3 '1' if the consumer is to be removed where it holds nothing more; 4 life of what is handed back, in ms;
--       5 and 6 the first and the last of the entry ids; then five a task: entry id, version, epoch, entry JSON, run JSON
-- returns the number of entries handed back
local stream, group, consumer, count = KEYS[1], ARGV[1], ARGV[2], 0
local list, ours = owned(stream, group, consumer, ARGV[5], ARGV[6])
if not list then list, ours = {}, {} end
for i = 0, (#KEYS - 1) / 2 - 1 do
  local record, run, at = KEYS[i * 2 + 2], KEYS[i * 2 + 3], 7 + i * 5
  local entry, version, epoch, entry_json, run_json =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4]
  if (ours[entry] or owns(stream, group, consumer, entry, list)) and redis.call('XDEL', stream, entry) == 1 then
    redis.call('XACK', stream, group, entry)
    local again = redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
    if run_json ~= '' then redis.call('SET', run, again .. ' ' .. run_json, 'PX', ARGV[4]) end
    local known = redis.pcall('GET', record)
    if type(known) == 'string' then
      local before, after = string.match(known, '^(%d+ %l+ )%S+( .*)$')
      if before then redis.call('SET', record, before .. again .. after, 'KEEPTTL') end
    end
    count = count + 1
  end
end
if ARGV[3] ~= '' then
  local left = redis.pcall('XPENDING', stream, group, '-', '+', 1, consumer)
  if not left.err and #left == 0 then redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer) end
end
return count
