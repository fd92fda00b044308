-- Renews the leases of the entries that are still ours.
--
-- KEYS  1 stream; then one run a task, or the stream again for a task that has none
-- ARGV  1 group; 2 consumer; 3 life of a run in ms; 4 and 5 the range of entry ids that is looked at;
--       then the entry ids, one a task, all in the range and at most 500
-- returns {the entry ids that are not ours any more, the entry ids that are ours but were not named}
local stream, group, consumer = KEYS[1], ARGV[1], ARGV[2]
local named, lost, unnamed, held = {}, {}, {}, {}
local list, ours = owned(stream, group, consumer, ARGV[4], ARGV[5])
if not list then list, ours = {}, {} end
for i = 6, #ARGV do
  local entry = ARGV[i]
  named[entry] = true
  if ours[entry] or owns(stream, group, consumer, entry, list) then
    held[#held + 1] = entry
    if KEYS[i - 4] ~= stream then redis.call('PEXPIRE', KEYS[i - 4], ARGV[3]) end
  else
    lost[#lost + 1] = entry
  end
end
for _, entry in ipairs(list) do if not named[entry] then unnamed[#unnamed + 1] = entry end end
if #held > 0 then
  held[#held + 1] = 'JUSTID'
  redis.call('XCLAIM', stream, group, consumer, 0, unpack(held))
end
return {lost, unnamed}
